"""Growth while training: triggers, the schedule, replay."""
