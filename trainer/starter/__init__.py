"""`trainer fit data=FOLDER`: choose an experiment that fits the files in a folder."""
