"""A study's items and images into its database, once."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import cast

from limner.feedback import checks
from limner.feedback.database import Database, Item, Meta, Picture, Slot, reading, writing
from limner.feedback.display import store_image
from limner.feedback.items import images_of, make_items
from limner.feedback.study import Study, identity
from limner.store import differences


def set_up(study: Study, database: Database) -> dict[str, int]:
    """Fill the database with the study's items, once; nothing is there until all is.

    Returns:
        what was left out and why (of images that cannot be shown: "unreadable image").

    Raises:
        ValueError: the database holds another study, or no items are left.
    """
    wanted = identity(study)
    with reading(database) as session:
        found = session.get(Meta, "study")
    if found is not None:
        if changed := list(differences(json.loads(found.value), wanted)):
            raise ValueError(
                "the database holds a study of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nChoose another output_dir or database."
            )
        return {}
    items, dropped = make_items(study)
    for item in items:
        if item.gold is not None and (problem := checks.gold_error(study, item.gold)):
            raise ValueError(f"{study.gold.source}: {item.key}: {problem}")
    pictures, unreadable = _store_images(study, {i for item in items for i in item.images})
    shown = [i for i in items if all(name in pictures for name in i.images)]
    if len(shown) < len(items):
        dropped["unreadable image"] = len(items) - len(shown)
    if not shown:
        raise ValueError(f"no items: {', '.join(f'{why} ({n})' for why, n in dropped.items())}; {'; '.join(unreadable[:3])}")
    with writing(database) as session:
        session.add(Meta(key="study", value=json.dumps(wanted)))
        session.add(Meta(key="unreadable", value=json.dumps(unreadable)))
        session.add_all(pictures.values())
        session.flush()
        for position, item in enumerate(shown):
            row = Item(
                key=item.key, position=position, text=item.text, pictures=json.dumps([pictures[i].token for i in item.images]),
                gold=None if item.gold is None else json.dumps(item.gold), message=item.message,
            )  # fmt: skip
            session.add(row)
            session.flush()
            if item.gold is None:
                session.add_all(Slot(item_id=cast(int, row.id), number=n, position=position) for n in range(study.overlap))
    return dropped


def _store_images(study: Study, wanted: set[str]) -> tuple[dict[str, Picture], list[str]]:
    found, unreadable = dict[str, Picture](), list[str]()
    for image in images_of(study, wanted):
        try:
            shown = store_image(images_folder(study), image.image, f"image {image.id}")
        except ValueError as error:
            unreadable.append(str(error))
            continue
        found[image.id] = Picture(
            token=secrets.token_urlsafe(12), image_id=image.id, digest=shown.digest, media=shown.media, width=shown.width,
            height=shown.height,
        )  # fmt: skip
    return found, unreadable


def images_folder(study: Study) -> Path:
    """Where the images of a study lie as they are shown."""
    return Path(study.output_dir) / "images"
