"""What `trainer fit data=FOLDER` makes of a folder of data: a project to begin with."""
