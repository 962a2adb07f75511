"""A job of any size examined on one machine without a GPU: its ranks are built, none of them computes."""
