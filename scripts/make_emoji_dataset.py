"""Make class folders of emoji on white, train/<group>-<set>/<code points>.png and held_out/ alike.

    apt-get install fonts-noto-color-emoji unicode-data libfribidi0
    python scripts/make_emoji_dataset.py --out=assets/emoji64 --sets=twemoji=DIR,fluent=DIR

A family of variants, by skin, hair and gender, lies on one side in all sets. Beside the font, sets
are folders of pictures named as 1f468-200d-1f373.png; pretrained/README.md says where to get them.
"""

import collections
import hashlib
import re
from pathlib import Path

import checkout  # noqa: F401 - finds the project
from PIL import Image, ImageDraw, ImageFont, ImageOps

from libs.runtime import REQUIRED, file_path, run_main
from utils import UserError

FONT_SIZE, GLYPH = 109, (136, 128)  # of the font's bitmaps, the only ones that it has
SIDE, HELD_OUT, MOST = 64, 0.1, 4  # pixels; share of families; variants of one, pairs have 100
# What tells variants: variation selector, skin, gender, hair, direction, joiner.
VARIANTS = "[\ufe0f\U0001f3fb-\U0001f3ff\u2640\u2642\U0001f9b0-\U0001f9b3\u27a1\u200d]"
PEOPLE = str.maketrans("👨👩👦👧", "🧑🧑🧒🧒")
FLAGS = {
    "out": (file_path, REQUIRED, "the directory to write"),
    "font": (file_path, "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "the set noto"),
    "emoji_test": (file_path, "/usr/share/unicode/emoji/emoji-test.txt", "emoji by group"),
    "sets": (str, "", "further sets, name=DIR,name=DIR"),
}


def read_groups(path):
    """{emoji: first word of its group} of Unicode's emoji-test.txt."""
    parts = Path(path).read_text(encoding="utf-8").split("# group: ")[1:]
    lines = [(x, re.findall("^([^;#\n]+); fully-qualified", x, re.MULTILINE)) for x in parts]
    given = [(part.split()[0].lower(), points.split()) for part, found in lines for points in found]
    return {"".join(chr(int(x, 16)) for x in points): group for group, points in given}


def draw_uniform(text):
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def choose_variants(emoji, name):
    """{one of MOST variants of a family: family}, others in each set `name`."""
    chosen, counts = {}, collections.Counter()
    for variant in sorted(emoji, key=lambda variant: draw_uniform(name + variant)):
        family = re.sub(VARIANTS, "", variant.translate(PEOPLE)) or variant
        counts[family] += 1
        if counts[family] <= MOST:
            chosen[variant] = family
    return chosen


def read_set(source, emoji):
    """(emoji, code points, RGBA picture) of those that are a file of the folder `source`, whose
    names may lack variation selectors, or one glyph of the font. KeyError: Pillow lacks raqm.
    """
    names = {text: "-".join(f"{ord(character):04x}" for character in text) for text in emoji}
    if Path(source).is_dir():
        paths = {path.stem.lower().replace("-fe0f", ""): path for path in Path(source).iterdir()}
        found = {text: paths.get(name.replace("-fe0f", "")) for text, name in names.items()}
        yield from ((k, names[k], Image.open(x).convert("RGBA")) for k, x in found.items() if x)
        return
    font = ImageFont.truetype(source, FONT_SIZE)
    for text in (text for text in emoji if font.getlength(text, direction="ltr") <= GLYPH[0]):
        picture = Image.new("RGBA", GLYPH)
        ImageDraw.Draw(picture).text((0, 0), text, font=font, embedded_color=True)
        yield text, names[text], picture


def main(args):
    if missing := [path for path in (args.font, args.emoji_test) if not Path(path).exists()]:
        raise UserError(f"no {missing[0]}: apt-get install fonts-noto-color-emoji unicode-data")
    groups, sets = read_groups(args.emoji_test), [f"noto={args.font}", *args.sets.split(",")]
    for name, _, source in (word.partition("=") for word in sets if word):
        families = choose_variants(groups, name)
        for emoji, points, picture in read_set(source, families):
            part = "held_out" if draw_uniform(families[emoji]) < HELD_OUT else "train"
            folder = Path(args.out, part, f"{groups[emoji]}-{name}")
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = ImageOps.pad(picture.convert("RGB"), (SIDE, SIDE), color="white")
            picture.save(folder / f"{points}.png")


if __name__ == "__main__":
    run_main(main, FLAGS)
