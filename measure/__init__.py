"""What a run does with a model: functions that measure and return values, and print nothing."""
