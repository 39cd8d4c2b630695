"""What keeps a run alive and tells what happened to it: watchdog, guards, health, signals, history."""
