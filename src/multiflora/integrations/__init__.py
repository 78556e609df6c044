"""Multiflora in other people's programs: a folder for each, found by that program itself."""
