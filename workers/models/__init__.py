"""Foundation models behind one protocol, `ModelRunner`."""
