"""What crosses a file boundary: strict, frozen models of job files, site profiles and run.toml."""
