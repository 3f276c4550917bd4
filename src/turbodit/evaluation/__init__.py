"""Measures of videos: against each other, against a distribution, and of themselves alone."""
