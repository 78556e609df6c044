"""Multiflora in other people's training programs: a folder for each, found by that program itself."""
