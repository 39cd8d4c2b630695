"""The training program: configuration, tasks, models, objectives, the loop and what keeps it alive."""
