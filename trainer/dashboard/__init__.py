"""The page of `trainer dashboard`: runs, curves and logs in a browser, read from the run directories as they are."""
