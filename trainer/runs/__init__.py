"""The run directory, the records in it, and what can be derived from them: state, summary, ledger, root cause."""
