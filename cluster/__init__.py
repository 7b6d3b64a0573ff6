"""Who holds what: placement, demand, and the table that routers read.

Pure Python with a clock passed in, and thin Ray actors.
"""
