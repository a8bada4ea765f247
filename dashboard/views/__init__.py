"""The pages, one file each: show(view) draws it."""
