"""The live screen of `watch`: what it shows, and its keys."""
