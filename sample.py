"""Makes a video from one image, a prompt and a camera path.

    python sample.py
    python sample.py --weights DIR --image room.png --prompt "a room" --action "w-40,dw-20"

Without arguments it runs the small world and its refiner. `--no_refiner` decodes stage 1 instead,
and so does `--weights` without `--refiner_weights`. For other weights, the defaults are those of
the released model; see `configs/`. The last line that it prints is the path of the output. Bad
input gives one line and exit status 2.
"""

from sanawm_jax.sampling.cli import main

if __name__ == "__main__":
    main()
