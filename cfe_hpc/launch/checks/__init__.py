"""What is looked at before a job is sent; `checking` runs it all."""
