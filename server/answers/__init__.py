"""From a generation to an answer in the words of one interface: whole, or as a stream."""
