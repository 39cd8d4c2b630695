"""Speaks one word with the espeak-ng library of the package espeakng-loader, as `espeak-ng --stdout` does.

    python data/synthesis/espeak.py LIBRARY DATA VOICE SPEED PITCH WORD > word.wav

Each word needs a process of its own: the library keeps state between words, also after `espeak_Terminate`, so that the
samples of a word would depend on the words before it.  speak_lib.h of espeak-ng documents the functions.
"""

import ctypes
import struct
import sys

SYNCHRONOUS, UTF8, RATE, PITCH = 2, 1, 1, 3  # AUDIO_OUTPUT_SYNCHRONOUS, espeakCHARS_UTF8, espeakRATE, espeakPITCH
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main(library: str, data: str, voice: str, speed: str, pitch: str, word: str) -> None:
    """Writes a WAV file of 16-bit mono samples to stdout; exits with a sentence where the voice is missing."""
    espeak, parts = ctypes.CDLL(library), []

    def collect(samples, count: int, events) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    rate, callback = espeak.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), 0), CALLBACK(collect)
    espeak.espeak_SetSynthCallback(callback)
    if rate <= 0 or espeak.espeak_SetVoiceByName(voice.encode()):
        sys.exit("the voice does not exist" if rate > 0 else "the library cannot read its data")
    espeak.espeak_SetParameter(RATE, int(speed), 0)
    espeak.espeak_SetParameter(PITCH, int(pitch), 0)
    text = word.encode()
    espeak.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, UTF8, None, None)
    wave = b"".join(parts)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(wave), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16,
                       b"data", len(wave))  # fmt: skip
    sys.stdout.buffer.write(head + wave)


if __name__ == "__main__":
    main(*sys.argv[1:])
