"""One process per device: rank facts, rendezvous, the stop protocol and Run."""
