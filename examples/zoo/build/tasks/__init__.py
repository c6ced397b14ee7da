"""The ten tasks of the zoo, one recipe a module."""
