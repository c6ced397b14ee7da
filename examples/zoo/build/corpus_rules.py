"""What the pretraining corpus takes and what it leaves out: names, licences, scripts, packages."""

# ruff: noqa: SIM905, RUF001, ISC004 - long word lists read better as text; the scripts are meant

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TEST_ICON_SETS = frozenset(
    "bitcoin-icons boxicons bpmn bx bxl bxs bytesize circum codex cuida dinkie-icons ei el emojione "
    "emojione-monotone emojione-v1 eva fe feather foundation fxemoji guidance healthicons humbleicons icon-park "
    "icon-park-outline icon-park-solid icon-park-twotone iwwa lineicons lsicon lucide lucide-lab majesticons "
    "octicon oi ph pixel pixelarticons solar wi".split()
)
"""Sets of the icons task's test families."""

CONCEPT_WORDS = frozenset(
    "calendar star camera bookmark link cloud heart home house folder lock flag key search magnify shield clock "
    "bell notification eye sun moon phone call globe clipboard book trophy gift map rocket microphone mic user "
    "person account pencil edit trash delete bin printer print cart umbrella car wifi settings cog gear mail "
    "envelope email crown magnifying-glass credit-card shopping-cart".split()
)
"""Names of the icons task's classes: neither pictures of that name nor the word itself are in the corpus."""

ICON_LICENSES = frozenset(
    "MIT Apache-2.0 CC0-1.0 ISC BSD-3-Clause CC-BY-4.0 CC-BY-3.0 OFL-1.1 MPL-2.0 Unlicense CC-BY-SA-4.0".split()
)

_STYLES = (
    "outline|outlined|filled|fill|solid|line|bold|light|thin|duotone|regular|rounded|round|sharp|twotone|linear|"
    "broken|o|color|sm|lg|mini|micro|bulk|alt|dark|flat|sharp-filled|rounded-filled|remix|block|twotone-loop|loop"
)
STYLE_SUFFIX = re.compile(rf"-({_STYLES}|[0-9]+|[0-9]+px|[a-z])$")
STOP_WORDS = frozenset(_STYLES.split("|")) | frozenset(
    "the of and in on with for to by icon icons logo px svg png new old type style variant original plain color "
    "wordmark line twotone glyph inverse baseline default standard symbol rc cc usd de la le".split()
)

STELLARIUM_TASK_BODIES = (
    "mercury venus earth moon mars phobos vesta ceres jupiter io europa ganymede callisto saturn mimas enceladus "
    "tethys dione rhea iapetus hyperion triton pluto charon"
).split()


def is_test_icon_set(prefix: str, info: Mapping[str, Any]) -> bool:
    """Says whether an icon set must stay out: test family of the icons task, emoji, or flags and maps."""
    return (
        prefix in TEST_ICON_SETS
        or "emoji" in prefix
        or prefix.startswith(("noto", "twemoji", "openmoji", "flag"))
        or info.get("category") in ("Emoji", "Flags / Maps")
    )


def _span(first: str, last: str) -> str:
    return "".join(chr(code) for code in range(ord(first), ord(last) + 1))


SCRIPTS = (
    (
        "hiragana",
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
    ),
    (
        "katakana",
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン",
    ),
    (
        "han",
        "一二三四五六七八九十人大小中山川日月火水木金土田口目耳手足王玉石竹米糸貝車門雨雪花草虫犬鳥魚馬天空星風"
        "上下左右東西南北入出立休見学校先生名年男女子本文字町村林森力白赤青黒早夕気音",
    ),
    (
        "hangul",
        "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지치"
        "강남동문반산성원인정한글말",
    ),
    ("thai", _span("ก", "ฮ") + _span("๐", "๙")),
    ("lao", "ກຂຄງຈສຊຍດຕຖທນບປຜຝພຟມຢຣລວຫອຮ"),
    ("khmer", _span("ក", "អ")),
    ("myanmar", _span("က", "အ")),
    ("tibetan", "ཀཁགངཅཆཇཉཏཐདནཔཕབམཙཚཛཝཞཟའཡརལཤསཧཨ"),
    ("arabic", "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"),
    ("hebrew", _span("א", "ת")),
    ("greek", "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφχψω"),
    ("cyrillic", "БГДЖЗИЛПУФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"),
    ("armenian", _span("Ա", "Ֆ") + _span("ա", "ֆ")),
    ("georgian", _span("ა", "ჰ")),
    ("devanagari", _span("अ", "ऋ") + "एऐओऔ" + _span("क", "न") + _span("प", "र") + "लवशषसह" + _span("०", "९")),
    ("bengali", "অআইঈউঊএঐওঔকখগঘঙচছজঝঞটঠডঢণতথদধনপফবভমযরলশষসহ" + _span("০", "৯")),
    ("gujarati", "અઆઇઈઉઊએઐઓઔકખગઘચછજઝટઠડઢણતથદધનપફબભમયરલવશષસહ"),
    ("gurmukhi", "ਅਆਇਈਉਊਏਐਓਔਕਖਗਘਙਚਛਜਝਟਠਡਢਣਤਥਦਧਨਪਫਬਭਮਯਰਲਵਸਹ"),
    ("tamil", "அஆஇஈஉஊஎஏஐஒஓகஙசஞடணதநபமயரலவழளறன"),
    ("telugu", "అఆఇఈఉఊఎఏఐఒఓఔకఖగఘచఛజఝటఠడఢణతథదధనపఫబభమయరలవశషసహ"),
    ("malayalam", "അആഇഈഉഎഏഒഓകഖഗഘങചഛജഝഞടഠഡഢണതഥദധനപഫബഭമയരലവശഷസഹളഴറ"),
    ("ethiopic", "ሀለሐመሠረሰሸቀበተቸኀነኘአከኸወዐዘዠየደጀገጠጨጰጸፀፈፐ"),
    ("mathematics", "∀∂∃∅∇∈∏∑√∝∞∠∧∨∩∪∫≈≠≡≤≥⊂⊃⊕⊗←↑→↓↔⇒⇔□△◇○●■▲◆"),
)
"""Names and characters; letters that look like a Latin capital are left out where a script has them."""

FONT_PACKAGES = tuple(
    "fonts-takao-gothic fonts-takao-mincho fonts-aoyagi-kouzan-t fonts-aoyagi-soseki fonts-dotgothic16 "
    "fonts-konatu fonts-kouzan-mouhitsu fonts-misaki fonts-monapo fonts-motoya-l-cedar fonts-motoya-l-maruberi "
    "fonts-mplus fonts-oradano-mincho-gsrr fonts-rampart fonts-reggae fonts-rocknroll fonts-sawarabi-gothic "
    "fonts-sawarabi-mincho fonts-seto fonts-stick fonts-umeplus fonts-vlgothic fonts-yusei-magic fonts-kiloji "
    "fonts-dejima-mincho fonts-ipaexfont-mincho fonts-horai-umefont fonts-morisawa-bizud-gothic fonts-migmix "
    "fonts-nanum fonts-nanum-extra fonts-unfonts-core fonts-unfonts-extra fonts-baekmuk fonts-alee "
    "fonts-woowa-bm fonts-lexi-gulim fonts-thai-tlwg-ttf fonts-sipa-arundina fonts-hosny-amiri fonts-kacst "
    "fonts-kacst-one fonts-farsiweb fonts-arabeyes fonts-paktype fonts-lemonada fonts-sil-scheherazade "
    "fonts-sil-lateef fonts-sil-harmattan fonts-hosny-thabit fonts-nafees fonts-ukij-uyghur fonts-gfs-didot "
    "fonts-gfs-artemisia fonts-gfs-bodoni-classic fonts-gfs-complutum fonts-gfs-didot-classic fonts-gfs-gazis "
    "fonts-gfs-neohellenic fonts-gfs-olga fonts-gfs-porson fonts-gfs-solomos fonts-gfs-theokritos "
    "fonts-freefont-ttf fonts-noto-core fonts-paratype fonts-open-sans fonts-roboto-unhinted fonts-lato "
    "fonts-cmu fonts-junicode fonts-inter fonts-go fonts-vollkorn fonts-quicksand fonts-deva-extra "
    "fonts-lohit-deva fonts-gargi fonts-nakula fonts-sahadeva fonts-samyak-deva fonts-beng-extra "
    "fonts-lohit-beng-bengali fonts-lohit-taml fonts-taml-tscu fonts-telu-extra fonts-lohit-telu "
    "fonts-smc-rachana fonts-smc-manjari fonts-smc-meera fonts-smc-chilanka fonts-gujr-extra fonts-guru-extra "
    "fonts-lohit-gujr fonts-khmeros fonts-lao fonts-sil-padauk fonts-bpg-georgian fonts-sil-ezra culmus "
    "culmus-fancy fonts-sil-abyssinica fonts-tibetan-machine fonts-oflb-asana-math fonts-wqy-zenhei "
    "fonts-arphic-ukai".split()
)
"""Debian packages with other scripts; none is among the letters task's packages."""
