"""Questions with demonstrations, and the order in which they are served."""
