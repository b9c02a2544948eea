"""Training that a method takes part in: `TrainingRun` for plain loops, and callbacks for trainers."""
