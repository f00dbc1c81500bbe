"""What every run needs: threads, scratch space, buffers, provenance, selected modules."""
