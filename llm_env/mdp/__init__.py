"""Episodes of a task with its prompts, its reward, and (if asked) an engine that reads along: what all faces show."""
