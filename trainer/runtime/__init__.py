"""What every rank needs, whatever it trains: signals, heartbeat, attempt, random numbers, collectives, memory."""
