"""What runs inside: these files are started by path and import nothing of the package."""
