"""What a scan costs to convolve: `python -m jaxsparse.inspect scan.npz --voxel 0.05`.

`statistics` counts, over kernel maps on the host; `scan` reads points and makes the pyramid of levels that is counted;
`report` writes tables and `draw` a picture of the result. None of them is needed to run a network.
"""
