"""How a run runs: its parts, a step, passes, what a step does when it fails."""
