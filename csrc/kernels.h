// Every kernel, for the target whose file includes this one.
#include "simd/product.h"
#include "loss/policy_loss.h"
#include "weights/tokens.h"
#include "attention/mass.h"
#include "attention/column_sum.h"
#include "focus.h"
#include "loss/logits.h"
#include "attention/forward.h"
