"""Notifications: what happened to a run, sent to people by webhook, mail or a command (section `notify`)."""
