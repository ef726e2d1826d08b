"""axe-core's check of what a browser shows."""

from __future__ import annotations

import json

from browser import Browser
from npm_packages import npm_folder


def barriers(browser: Browser) -> list[str]:
    """What is serious or critical on the page that is open: the rule, and where it is broken."""
    script = (npm_folder("axe-core") / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    browser.value(
        f"{script}; document.getAnimations().forEach((one) => one.finish())"
    )  # colours as they stay
    found = json.loads(browser.value("axe.run().then((found) => JSON.stringify(found.violations))"))
    return [
        f"{violation['id']} ({violation['impact']}): {node['target']} {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
