"""What a process gives up before it meets anything untrusted, one module a means of the platform."""
