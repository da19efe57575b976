"""Clean-up of runs roots: what may go is planned, looked at, and then removed exactly as planned, or not at all."""
