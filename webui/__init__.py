"""The web app: a client of the same commands, in a process that never loads torch."""
