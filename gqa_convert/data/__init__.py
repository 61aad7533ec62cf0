"""Text into token blocks: sources, packing without waste, positions that resume exactly, span corruption."""
