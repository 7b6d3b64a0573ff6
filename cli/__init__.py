"""The hands: the `flora` command. The only package that prints."""
