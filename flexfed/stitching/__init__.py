"""FedStitch's room: pre-trained networks cut into blocks, and a network for a new task stitched from them."""
