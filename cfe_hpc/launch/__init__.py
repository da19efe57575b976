"""From a job and a site to a submitted run. Login node only."""
