"""A run that resumes: where it starts, with which data and random numbers."""
