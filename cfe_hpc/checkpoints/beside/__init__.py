"""Saving while training goes on: helper processes, and what ranks settle with them."""
