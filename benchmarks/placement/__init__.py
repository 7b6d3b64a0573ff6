"""The placement simulator: the planner and the routing of `cluster`, and their rivals, on a clock of its own."""
