/* float16 and bfloat16 to float32 and back, rounded to nearest even. Loops of them vectorise: no branches,
 * and no ?: around floating-point arithmetic either, which compilers take for one. */
#ifndef LOGITLOSS_HALF_H
#define LOGITLOSS_HALF_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint32_t select_bits(int condition, uint32_t a, uint32_t b)
{
    uint32_t mask = -(uint32_t)condition;
    return (a & mask) | (b & ~mask);
}

/* The exponent's bias is off by 112: a product mends it, for subnormal numbers too. */
static inline float half_to_float(uint16_t half)
{
    uint32_t magnitude = half & 0x7fffu;
    uint32_t finite = bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f);
    uint32_t bits = select_bits(magnitude >= 0x7c00u, 0x7f800000u | magnitude << 13, finite);
    return float_of_bits(bits | (uint32_t)(half & 0x8000u) << 16);
}

/* Under 2^-14 the results are multiples of 2^-24: adding 1/2 rounds to one and leaves it in the low bits. */
static inline uint16_t float_to_half(float value)
{
    uint32_t all = bits_of_float(value), magnitude = all & 0x7fffffffu;
    uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = select_bits(magnitude < 0x38800000u, subnormal, normal - (112u << 10));
    half = select_bits(magnitude >= 0x477ff000u, 0x7c00u, half);
    half = select_bits(magnitude > 0x7f800000u, 0x7e00u, half);
    return (uint16_t)(half | (all >> 16 & 0x8000u));
}

static inline float bfloat_to_float(uint16_t bfloat) { return float_of_bits((uint32_t)bfloat << 16); }

static inline uint16_t float_to_bfloat(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

#endif
