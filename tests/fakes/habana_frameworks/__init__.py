"""A stand-in for Intel's Gaudi bridge: enough of its interface to run the product's code paths on a CPU.

Written from the interface that Intel documents; it imitates what callers see, not how the hardware works.
"""
