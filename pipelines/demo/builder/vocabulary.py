"""What the world is about: the concepts, who draws them under which names, and what they are kinds of.

A hand-made table, because icon names are made for interfaces: a name is kept when it is a thing that one can
point at, and left out when it is a gesture of a program (``align-left``), a brand or a letter. Glyph names
are written without the style suffix (``-outline``, ``-fill``, ``-2``), which :mod:`pipelines.demo.builder.icons`
strips from the fonts' names.
"""

from __future__ import annotations

from dataclasses import dataclass

# name, synonym, ... | superclasses | glyph names, tried in every font, or in one font only (`fa:crow`).
# The name itself, hyphenated, is tried as well; `!ri:flashlight` says that this font means something else by it.
_CONCEPTS = """
bird | animal | fa:crow fa:dove fa:kiwi-bird
bug, beetle | animal | bug-beetle
cat | animal |
cow | animal |
dog | animal | dog-side
fish | animal | fish-fins
horse | animal | horse-head
paw print, paw | | paw
spider | animal |
airplane, plane | vehicle, aircraft | plane airplane-tilt plane-up airplane-in-flight
ambulance | vehicle | truck-medical
baby carriage, pram | vehicle | baby-carriage
bicycle, bike | vehicle | mdi:bike
bus | vehicle | bus-side bus-simple bus-double-decker
car, automobile | vehicle | car-side car-hatchback car-back roadster car-sports car-simple car-profile
caravan | vehicle |
cable car, gondola | vehicle | gondola cable-car
helicopter | vehicle, aircraft |
motorcycle, motorbike | vehicle | motorbike moped
police car | vehicle | police-car car-emergency
rocket | vehicle, aircraft | rocket-launch
sailboat | vehicle, watercraft | sail-boat
ship, ferry | vehicle, watercraft | ferry ph:boat
space shuttle, spaceship | vehicle, aircraft | space-ship shuttle-space space-shuttle
subway | vehicle | train-subway subway
taxi, cab | vehicle |
tractor | vehicle |
train | vehicle | train-profile
tram, streetcar | vehicle | train-tram train-simple ph:train-regional tram-side
truck, lorry | vehicle |
van | vehicle | van-passenger van-utility van-shuttle
wheelchair | | mdi:wheelchair-accessibility
anchor | |
shopping cart | container | cart cart-shopping shopping-cart-simple
cloud | weather | cloud-simple
fog | weather | weather-fog fa:smog cloud-fog foggy mist
lightning | weather | lightning-bolt fa:bolt flash bolt-lightning ri:flashlight
moon | celestial body | moon-waning-crescent weather-night ri:moon-clear
rain | weather | weather-rainy weather-pouring cloud-rain cloud-showers-heavy rainy heavy-showers showers
rainbow | weather |
snow cloud, snowfall | weather | weather-snowy cloud-snow snowy weather-snowy-heavy
snowflake | weather |
star | celestial body |
sun | celestial body, weather | weather-sunny white-balance-sunny sun-dim
thunderstorm | weather | weather-lightning cloud-bolt cloud-lightning thunderstorms
tornado | weather | weather-tornado
hurricane, typhoon | weather | weather-hurricane typhoon
wind | weather | weather-windy windy
partly cloudy sky | weather | weather-partly-cloudy cloud-sun sun-cloudy
meteor, comet | celestial body |
earth, globe | celestial body | fa:globe ph:globe ri:earth ri:global earth-americas globe-hemisphere-west
fire, flame | | flame fa:fire-flame-simple
water drop, drop | | mdi:water droplet drop
waves, water | | fa:water
mountain | landform | mdi:terrain mdi:image-filter-hdr mountains fa:mountain-sun
volcano | landform |
apple | food, fruit | food-apple apple-whole !mdi:apple !ri:apple
bread, toast | food | bread-slice
burger, hamburger | food | hamburger
cake | food, dessert | cake-layered cake-candles ri:cake-3 cupcake
candy cane | food, dessert | candycane candy-cane
carrot | food |
cheese | food |
chicken leg, drumstick | food | food-drumstick drumstick-bite
chili pepper | food | chili-mild chili-medium chili-hot pepper-hot
cocktail, martini | drink | glass-cocktail martini martini-glass martini-glass-citrus martini-glass-empty
coffee, cup | drink | coffee mug-saucer mug-hot cup
beer | drink | glass-mug beer-mug-empty beer
wine | drink | glass-wine wine wine-glass wine-glass-empty wine-glass-alt
cookie | food, dessert | cookie-bite
egg | food |
hot dog | food | food-hot-dog hotdog
ice cream | food, dessert |
lemon | food, fruit | fruit-citrus
pizza | food | pizza-slice
bottle | container | bottle-wine wine-bottle bottle-soda bottle-water bottle-soda-classic
cooking pot | kitchenware | pot pot-steam cooking-pot pot-mix
fork and knife, cutlery | kitchenware | silverware-fork-knife utensils fork-knife restaurant
knife | kitchenware, weapon | knife-military
blender | kitchenware, appliance |
refrigerator, fridge | appliance | fridge
bell | musical instrument |
guitar | musical instrument | guitar-acoustic guitar-electric
music note | | music-note music music-notes
headphones | electronics | headphone headphones
microphone | electronics | mic microphone-lines microphone-stage
radio | electronics |
loudspeaker, speaker | electronics | mdi:speaker ri:speaker ph:speaker-hifi
megaphone, bullhorn | | bullhorn megaphone
compact disc, disc | electronics | disc album compact-disc mdi:album record-vinyl
film strip, film | | film film-strip filmstrip
clapperboard | | clapperboard ri:clapperboard mdi:movie-open film-slate
camera | electronics | camera-retro
video camera, camcorder | electronics | video video-camera camcorder vidicon
webcam | electronics |
television, tv | electronics | tv television-classic television-simple
laptop | electronics, computer | macbook
desktop computer, monitor | electronics, computer | monitor desktop computer fa:desktop ri:computer
keyboard | electronics |
computer mouse, mouse | electronics | mouse mouse-simple computer-mouse
printer | electronics | print
phone, telephone | electronics | phone-classic
smartphone, cellphone | electronics | cellphone mobile smartphone device-mobile mobile-screen mobile-button
tablet | electronics, computer | device-tablet tablet-screen-button
smartwatch, watch | electronics, timepiece | watch ri:watch smart-watch
game controller, gamepad | electronics, toy | gamepad game-controller controller
robot | electronics |
calculator | electronics |
computer chip, processor | electronics | cpu microchip mdi:cpu-64-bit
floppy disk | electronics | floppy floppy-disk save floppy-disk-back
battery | | battery battery-full
router | electronics | router-wireless !mdi:router
antenna, radio tower | electronics | radio-tower tower-broadcast broadcast base-station tower-cell cell-tower
satellite dish | electronics | satellite-uplink satellite-dish
light bulb, lamp | light source | lightbulb ph:lightbulb-filament
desk lamp | light source, furniture | lamp desk-lamp
flashlight | light source | !ri:flashlight
plug | | power-plug plug
magnet | tool | magnet-straight
fan | appliance |
faucet, tap | | faucet
shower | |
bathtub, bath | furniture | bath bathtub hot-tub
toilet | furniture |
toilet paper | | paper-roll
bed | furniture | bed-double bed-king hotel-bed
chair | furniture | armchair chair seat chair-rolling
sofa, couch | furniture | couch sofa
door | | door-closed
key | |
lock, padlock | | lock-simple
alarm clock, alarm | timepiece | alarm
clock | timepiece | ri:time clock-time-four
hourglass | timepiece | timer-sand hourglass-half hourglass-simple
stopwatch | timepiece | stopwatch timer ri:timer
binoculars | tool |
broom | tool |
bucket | container | bucket fill-drip ph:paint-bucket pail
compass | tool | compass-rose
eraser | stationery |
hammer | tool |
wrench, spanner | tool | wrench
paint brush, brush | tool, stationery | brush paint-brush paintbrush
paint roller | tool | paint-roller format-paint
palette | stationery |
paperclip | stationery |
pen, fountain pen | stationery | fountain-pen-tip pen-nib fountain-pen ph:pen-nib ball-pen
pencil | stationery | lead-pencil
push pin, pin | stationery | pin thumbtack push-pin pushpin
ruler | tool, stationery | ruler-horizontal
scissors | tool, stationery | content-cut scissors-cut
screwdriver | tool |
toolbox | tool, container |
microscope | tool |
magnifying glass | tool | magnify search magnifying-glass
thermometer | tool | temperature-half temperature-full temperature-empty thermometer-simple
scales, balance | tool | scale-balance scale-balanced scales
stethoscope | medicine |
syringe | medicine | needle syringe
bandage | medicine | bandaids band-aid
pill, capsule | medicine | capsule capsules pills medicine-bottle
flask | medicine | flask-empty flask-round
test tube, vial | medicine | test-tube vial
first aid kit | medicine, container | medical-bag first-aid-kit kit-medical suitcase-medical
bone | body part |
brain | body part |
ear | body part | ear-hearing ear-listen ear
eye | body part |
fingerprint | body part |
hand | body part | hand-back-right hand hand-front-right
handshake | |
heart | body part | heart-straight
lungs | body part |
skull | body part | skull-crossbones
tooth | body part | tooth
footprint, shoe print | | foot-print footprint shoe-prints shoe-print
baby | | baby-face
nurse, doctor | | doctor user-doctor nurse user-nurse
ghost | | ghost-smile
alien | | alien aliens
snowman | |
crown | jewellery | vip-crown
diamond, gem | jewellery | gem diamond-stone vip-diamond sketch
ring | jewellery |
glasses, eyeglasses | clothing | eyeglasses
graduation cap, mortarboard | clothing | graduation-cap mdi:school
hat | clothing | hat-fedora hat-cowboy hat-cowboy-side
hard hat | clothing | helmet-safety hard-hat
surgical mask | clothing, medicine | face-mask mask-face surgical-mask head-side-mask
theatre masks | | drama-masks masks-theater
shirt, t-shirt | clothing | tshirt-crew t-shirt shirt tshirt-v
handbag, tote | container, clothing | handbag tote purse handbag-simple tote-simple
shopping bag | container | bag-shopping shopping shopping-bag-open
shopping basket | container | basket basket-shopping shopping-basket
suitcase, luggage | container | bag-suitcase suitcase luggage-cart suitcase-rolling suitcase-simple
briefcase | container | bag-checked
wallet | container |
piggy bank | container |
package, box | container | package-variant-closed fa:box ri:box
gift, present | container |
trash can, bin | container | trash-can trash delete delete-bin delete-bin-2 trash-simple
umbrella | |
beach umbrella | | umbrella-beach
flower | plant | flower-tulip flower-lotus plant
cactus | plant |
clover | plant |
leaf | plant |
seedling, sprout | plant | sprout seedling ph:plant
tree | plant | !fa:tree
pine tree, evergreen | plant | tree-evergreen fa:tree
wheat, barley | plant, food | barley wheat-awn
bank | building | bank building-columns
castle, fort | building | fa:chess-rook
church | building |
factory, industry | building | factory industry
hospital | building | hospital-building
house, home | building | home house house-simple home-smile
hotel | building |
mosque | building |
skyscraper, office building | building | office-building building buildings domain
store, shop | building | store storefront shop store-front
tent | building | tent campground
warehouse | building |
bridge | building | bridge bridge-water
stairs | | stairs steps
elevator, lift | | elevator
fuel pump, gas pump | | gas-station gas-pump
fire extinguisher | | fire-extinguisher
lifebuoy | | lifebuoy life-ring
road | |
flag | | flag-variant
finish flag | | flag-checkered
map | | map-trifold
baseball | ball, sport | baseball
basketball | ball, sport |
american football | ball, sport | mdi:football fa:football ph:football
soccer ball | ball, sport | mdi:soccer fa:futbol ph:soccer-ball ri:football
tennis ball | ball, sport | tennis-ball
volleyball | ball, sport |
billiard ball, pool ball | ball, sport | billiards 8-ball mdi:billiards
bowling ball | ball, sport | bowling bowling-ball
dumbbell, barbell | sport | dumbbell barbell weight-lifter
hockey puck | sport |
skier, skiing | sport | ski person-skiing
swimmer, swimming | sport | swim person-swimming swimming
runner, running | sport | run person-running
trophy | sport |
medal | sport | medal
target, dartboard | sport | bullseye target bullseye-arrow
dice, die | toy | dice-5 dice-five dice-6 dice-six
chess king | toy |
chess knight | toy |
chess pawn | toy |
chess queen | toy |
playing card spade, spade | toy | cards-spade ph:spade cards-playing-spade
puzzle piece, jigsaw | toy | puzzle puzzle-piece
magic wand, wand | toy | auto-fix wand-magic wand-magic-sparkles magic-wand magic wand-sparkles
bomb | weapon |
gun, pistol | weapon | pistol gun
sword | weapon |
shield | weapon | shield-simple
coins, coin | money | coins cash-multiple coin copper-coin hand-coin
cash, banknote | money | cash money money-bill money-bill-1
credit card | money | bank-card
receipt | money, stationery | bill
ticket | | ticket-confirmation
book | reading matter |
open book | reading matter | book-open book-open-page-variant book-open-reader
newspaper | reading matter |
notebook, notepad | reading matter, stationery | notebook book-journal note-book notepad
envelope, letter | stationery | email envelope mail envelope-simple
calendar | stationery | calendar-blank calendar-days
clipboard | stationery |
folder | stationery | folder-simple
passport | |
scroll, parchment | reading matter | script scroll script-text
barcode | |
paper plane | | send paper-plane paper-plane-tilt send-plane
gear, cog | | cog gear gears settings gear-six
recycling symbol | | recycle
peace sign | | peace
yin yang | | yin-yang
atom | | atom
virus | | virus
dna | |
biohazard sign | | biohazard
radiation sign, radioactive | | radioactive radiation
"""

# Things beside the concepts: no classifier knows them. They appear among the probes and in the encoder's lessons.
_OTHERS = """
axe ladder drum drum-steelpan robot-vacuum vacuum treasure-chest treasure-map wind-turbine wind-power boom-gate
satellite satellite-variant traffic-cone barricade
abacus airballoon air-conditioner ammunition anvil arch arrow-projectile babel balloon baguette
barn barrel bat beaker bee bell-sleep boombox boomerang bow-arrow bowl bowl-mix bugle bulldozer
bunk-bed butterfly cannabis candelabra candle car-battery car-door car-seat car-tire-alert cassette
ceiling-fan chandelier chess-bishop cigar coffee-maker coffin cone corn countertop
crane crutch curling curtains desk diving-helmet diving-scuba-tank dolphin domino-mask donkey doorbell dresser
drone duck dump-truck earbuds elephant engine excavator fence ferris-wheel fireplace
firework fishbowl football-helmet football-australian forklift fountain fruit-cherries fruit-grapes
fruit-pear fruit-pineapple fruit-watermelon frog garage gate glass-flute glass-tulip golf-tee grain grass
greenhouse grill halloween hanger harddisk hair-dryer hippo hook hops horseshoe human-cane igloo
hydro-power iron island jellyfish jump-rope kangaroo karate kayaking kettle kettlebell key-chain kite koala
ladybug lava-lamp lighthouse lighthouse-on lipstick locker lotion mace mailbox map-marker meditation
microwave mirror monitor-speaker mower muffin mushroom mustache nail necklace noodles nut oil-lamp
oil oar otter owl panda parachute paragliding parking patio-heater penguin piano pickaxe pig pillar pinwheel
pipe pitchfork plane-car pliers podium popcorn post-lamp power-socket pretzel printer-3d pumpkin quadcopter
rabbit racquetball radar radiator rake rice rickshaw rodent roller-skate rollerblade rug saw-blade
saxophone scooter screw-flat-top seal seat-flat set-square shaker shark sheep shovel shredder
shuriken sickle silo skateboard sledding snail snake snowboard snowmobile snowshoeing soldering-iron
spear speedometer spray spray-bottle sprinkler stadium stamper stapler stocking stomach stool stove submarine
sunglasses surfing table-furniture table-tennis taco tank tea teddy-bear telescope tennis
theater toaster toothbrush torch tortoise tower-beach tower-fire train-car trumpet tsunami
tumble-dryer turkey turtle typewriter ufo unicorn unicycle violin wall-sconce-flat wardrobe washing-machine
watering-can waterfall weather-sunset weight-gram whistle wizard-hat yurt zodiac-leo
bacon bong bowl-food bowl-rice campfire candy cubes dharmachakra disease dungeon
explosion feather glass-water hanukiah holly-berry icicles jar jar-wheat
jet-fighter joint kaaba kitchen-set land-mine-on landmark-dome lines-leaning locust mask-ventilator mitten
monument mosquito mosquito-net mound oil-can oil-well parachute-box pen-ruler plate-wheat poop pump-soap
ribbon sack-dollar sheet-plastic shrimp sink sleigh smoking snowplow soap socks spa spoon spray-can
stamp stroopwafel swatchbook tarp teeth-open toilet-portable torii-gate tower-observation trailer trowel
vault vest walkie-talkie weight-hanging whiskey-glass worm cardholder chalkboard cube headlights jeep
math-operations poker-chip swatches boxing e-bike goblet ink-bottle
ping-pong quill-pen remote-control riding sip spy takeaway camera-lens compasses
ankh star-of-david menorah cross gopuram vihara khanda om synagogue hamsa
dice-d20 dice-d6 dice-one dice-two dice-three dice-four
zodiac-aquarius zodiac-aries zodiac-cancer zodiac-capricorn zodiac-scorpio
account-cowboy-hat account-hard-hat baby-bottle bag-personal ballot bash beaker-question
bench-back billboard blinds bookshelf cctv chef-hat
clippy collage crosshairs cup-water cupboard deskphone
dishwasher dolly dumpster escalator fuse gas-cylinder hand-saw hand-water hoop-house
human-scooter lectern loupe mine molecule movie-roll ornament
pan pool puzzle-heart racing-helmet rolodex safe scoreboard screw-lag
seesaw sofa-single solar-panel sword-cross tape-measure thermostat
tie toy-brick traffic-cone transmission-tower tray tunnel turbine valve
wall water-pump water-well wheel-barrow windsock wiper zip-disk
"""


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing with a name.

    ``glyphs`` are (designer, base name of a glyph) pairs to look for, designer "" meaning anybody;
    ``excluded`` are pairs that mean something else.
    """

    name: str
    synonyms: tuple[str, ...]
    superclasses: tuple[str, ...]
    glyphs: tuple[tuple[str, str], ...]
    excluded: frozenset[tuple[str, str]] = frozenset()


def _pairs(words: list[str]) -> tuple[tuple[str, str], ...]:
    split = (word.rpartition(":") for word in words)
    return tuple(dict.fromkeys((designer, name) for designer, _, name in split))


def concepts() -> list[Concept]:
    """The concepts that classifiers may learn, in the table's order."""
    table = []
    for line in _CONCEPTS.strip().splitlines():
        names, kinds, glyphs = (part.strip() for part in line.split("|"))
        name, *synonyms = (part.strip() for part in names.split(","))
        superclasses = tuple(part.strip() for part in kinds.split(",") if part.strip())
        words = [name.replace(" ", "-"), *glyphs.split()]
        included = _pairs([word for word in words if not word.startswith("!")])
        excluded = frozenset(_pairs([word[1:] for word in words if word.startswith("!")]))
        table.append(Concept(name, tuple(synonyms), superclasses, included, excluded))
    return table


def others() -> list[Concept]:
    """Things that no classifier learns, under their glyphs' own names."""
    return [
        Concept(word.replace("-", " "), (), (), _pairs([word])) for word in dict.fromkeys(_OTHERS.split())
    ]
