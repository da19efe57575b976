"""Before a job is sent: what memory it takes, where it could start, when, at what price, and what stands against it."""
