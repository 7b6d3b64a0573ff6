"""Readers and writers: adapter files on one side, `AdapterRows` on the other. Families live here."""
