"""Loops for the CPU, compiled on the machine they run on. An extra: everything works without a compiler, slower."""
