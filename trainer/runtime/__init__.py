"""Runtime of every rank, whatever it trains: signals, heartbeat, attempt, random numbers, collectives, memory."""
