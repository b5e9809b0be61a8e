"""Steps from one layout of the database to the next; ``versions`` holds one file a step."""
